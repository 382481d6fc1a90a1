"""Commands that publish and fetch: push-cache, pull-cache, push-student."""

from pathlib import Path
from typing import Annotated

import typer

from .options import JsonOption
from .printing import print_result, say


def push_cache(
    path: Annotated[Path, typer.Argument(help="Cache folder.")],
    repository: Annotated[str, typer.Argument(help="Data set of the Hub: owner/name; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="For you and your organisation only.")] = False,
    tag: Annotated[str | None, typer.Option(help="Default: v- and the start of the manifest's hash.")] = None,
    teacher_licence: Annotated[
        str | None, typer.Option(help="Licence of the teacher, if the manifest says unknown.")
    ] = None,
    data_licence: Annotated[str | None, typer.Option(help="Licence of the data, if the manifest says unknown.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Verify a cache and publish it on the Hub, with a card and a preview; the manifest goes up last, then a tag.

    The same command again continues what was interrupted and uploads nothing twice.
    """
    from ..shared.addresses import require_folder
    from ..shared.cache.push import push_cache as push

    require_folder(path, "push-cache")
    done = push(
        path, repository, private=private, tag=tag, teacher_licence=teacher_licence, data_licence=data_licence,
        say=say,
    )  # fmt: skip
    print_result(vars(done), as_json)


def pull_cache(
    address: Annotated[str, typer.Argument(help="owner/name, owner/name@revision or hf://datasets/owner/name.")],
    out: Annotated[Path, typer.Argument(help="New folder; the same command again continues it.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: the newest.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit/--no-audit", help="Fetch the audit too, which inspect-cache --audit reads.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Fetch a cache from the Hub at one commit and verify it in full; OUT/hub.json says which commit."""
    from ..shared.addresses import require_folder
    from ..shared.cache.pull import pull_cache as pull

    require_folder(out, "pull-cache")
    print_result(vars(pull(address, out, revision=revision, audit=audit, say=say)), as_json)


def push_student(
    path: Annotated[Path, typer.Argument(help="Folder of a finished student, or its run folder.")],
    repository: Annotated[str, typer.Argument(help="Model of the Hub: owner/name; made if it is not there.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Scores for the card, e.g. evaluation.json of tide eval; default: one beside it."),
    ] = None,
    cache: Annotated[
        str | None, typer.Option("--cache", help="The cache it was trained from, if it lies on the Hub by now.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="For you and your organisation only.")] = False,
    tag: Annotated[str | None, typer.Option(help="Default: v- and the start of the weights' hash.")] = None,
    teacher_licence: Annotated[
        str | None, typer.Option(help="Licence of the teacher, if the cache says unknown.")
    ] = None,
    data_licence: Annotated[str | None, typer.Option(help="Licence of the data, if the cache says unknown.")] = None,
    start_licence: Annotated[
        str | None, typer.Option(help="Licence of the checkpoint that training started from, for the card.")
    ] = None,
    gpu_hours: Annotated[float | None, typer.Option(help="What it cost, for the card.")] = None,
    hardware: Annotated[str | None, typer.Option(help="What it was trained on, for the card.")] = None,
    carbon_kg: Annotated[float | None, typer.Option(help="Kilograms of CO2 equivalent, for the card.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a finished student on the Hub: weights, tokenizer and a card with its scores, its origin and its cost.

    The same command again continues what was interrupted and uploads nothing twice.
    """
    from ..student_train.public_card import Cost
    from ..student_train.push_student import Published
    from ..student_train.push_student import push_student as push

    stated = Published(
        cache=cache, evaluation=evaluation, teacher_licence=teacher_licence, data_licence=data_licence,
        start_licence=start_licence, cost=Cost(gpu_hours, hardware, carbon_kg),
    )  # fmt: skip
    print_result(vars(push(path, repository, stated, private=private, tag=tag, say=say)), as_json)
