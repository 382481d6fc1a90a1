"""The standard library as data: many pairs, none twice, no module on both sides, every pair valid Python."""

import ast
import subprocess
import sys
import time
import warnings

import pytest
from tide.shared import stdlib_source
from tide.shared.stdlib_source import (
    MAX_BODY_BYTES,
    MIN_BODY_BYTES,
    join_pair,
    module_split,
    stdlib_pairs,
    stdlib_version,
)


def both_splits():
    return stdlib_pairs("train") + stdlib_pairs("heldout")


def pairs_of(source, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(source, newline="")
    return [(pair.prompt, pair.response) for pair in stdlib_source.module_pairs("module", path)]


def test_library_gives_thousands_of_pairs_and_about_six_percent_are_held_out():
    num_train, num_heldout = len(stdlib_pairs("train")), len(stdlib_pairs("heldout"))
    assert num_train > 3000
    assert num_heldout > 100
    assert 0.03 < num_heldout / (num_train + num_heldout) < 0.12


def test_no_module_stands_on_both_sides():
    train = {pair.module for pair in stdlib_pairs("train")}
    heldout = {pair.module for pair in stdlib_pairs("heldout")}
    assert len(train) > 100
    assert len(heldout) > 10
    assert not train & heldout


def test_held_out_side_is_not_ruled_by_one_module():
    modules = [pair.module for pair in stdlib_pairs("heldout")]
    assert max(modules.count(module) for module in set(modules)) < 0.25 * len(modules)


def test_split_of_a_module_depends_on_its_name_alone():
    # Frozen: these sides are part of every published comparison.
    assert {name: module_split(name) for name in ("enum", "shutil", "asyncio.tasks", "json.decoder", "tkinter")} == {
        "enum": "heldout", "shutil": "heldout", "asyncio.tasks": "heldout", "json.decoder": "train", "tkinter": "train",
    }  # fmt: skip


def test_no_prompt_and_no_response_occurs_twice_over_both_splits():
    pairs = both_splits()
    assert len({pair.prompt for pair in pairs}) == len(pairs)
    assert len({pair.response for pair in pairs}) == len(pairs)


def test_pairs_are_ordered_by_module_and_line():
    places = [(pair.module, pair.line) for pair in stdlib_pairs("train")]
    assert places == sorted(places)


def test_two_processes_build_the_same_pairs():
    program = (
        "import hashlib; from tide.shared.stdlib_source import stdlib_pairs\n"
        "print(hashlib.sha256(repr([stdlib_pairs('train'), stdlib_pairs('heldout')]).encode()).hexdigest())"
    )
    runs = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                       env={"PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(runs) == 1
    assert stdlib_pairs("train") == stdlib_pairs("train")


def test_bodies_keep_their_size_limits():
    sizes = [len(pair.response.encode()) for pair in both_splits()]
    assert min(sizes) >= MIN_BODY_BYTES
    assert max(sizes) <= MAX_BODY_BYTES


def test_prompt_and_response_join_to_one_function_with_docstring_and_body():
    for pair in both_splits():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes are the library's own
            tree = ast.parse(join_pair(pair.prompt, pair.response))
        assert len(tree.body) == 1, pair
        function = tree.body[0]
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef), pair
        assert ast.get_docstring(function), pair
        assert len(function.body) > 1, pair


def test_response_is_the_function_of_the_running_python():
    import shutil

    pair = next(pair for pair in stdlib_pairs("heldout") if pair.module == "shutil" and "def copy(" in pair.prompt)
    namespace = dict(vars(shutil))
    exec(join_pair(pair.prompt, pair.response), namespace)
    assert namespace["copy"].__code__.co_code == shutil.copy.__code__.co_code


def test_pair_keeps_decorators_comments_and_the_first_paragraph_only(tmp_path):
    source = '''
class A:
    @property
    # why
    def area(self,
             unit):
        """The area
        in a unit.

        Long story.
        """

        # first
        if unit:
            return self.a * unit  # scaled

        return self.a
        # after
'''
    assert pairs_of(source, tmp_path) == [
        (
            '@property\n# why\ndef area(self,\n         unit):\n    """The area\n    in a unit.\n    """',
            "# first\nif unit:\n    return self.a * unit  # scaled\n\nreturn self.a",
        )
    ]


@pytest.mark.parametrize(
    "body",
    [
        '"""Doc."""\n    pass',
        '"""Doc."""\n    raise NotImplementedError("a long enough explanation")',
        '"""Doc."""\n    ...',
        '"""Doc."""\n    return 1',
        '"""Doc."""; return [1, 2, 3, 4, 5, 6, 7, 8, 9]',
        "return [1, 2, 3, 4, 5, 6, 7, 8, 9]",
        '""""""\n    return [1, 2, 3, 4, 5, 6, 7, 8, 9]',
        '"""Doc."""\n    text = """\nleft of the margin"""\n    return text',
        '"""Doc."""\n    return """' + "x" * 600 + '"""',
    ],
)
def test_stub_bare_long_or_indivisible_function_gives_no_pair(body, tmp_path):
    assert pairs_of(f"def f():\n    {body}\n", tmp_path) == []


@pytest.mark.parametrize("docstring", ["ends with \\\\", 'says "yes"', "a \\\\d pattern", "two\n    lines", "日本語 ∇"])
def test_awkward_docstring_still_joins_to_the_same_text(docstring, tmp_path):
    source = f'def f():\n    """{docstring}\n    """\n    return [1, 2, 3, 4, 5, 6, 7, 8]\n'
    ((prompt, response),) = pairs_of(source, tmp_path)
    joined = ast.parse(join_pair(prompt, response)).body[0]
    original = ast.parse(source).body[0]
    assert ast.get_docstring(joined).strip() == ast.get_docstring(original).strip()


def test_nested_async_and_form_feed_functions_are_found(tmp_path):
    source = (
        "if True:\n    try:\n        pass\n    except OSError:\n        async def f():\n"
        "            'Doc.'\n\x0c\n            return await something_long()\n"
    )
    assert pairs_of(source, tmp_path) == [('async def f():\n    """Doc."""', "return await something_long()")]


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="expected one of train, heldout"):
        stdlib_pairs("test")


def test_version_names_the_running_python():
    assert stdlib_version() == "python-" + ".".join(map(str, sys.version_info[:3]))


def test_whole_library_is_cut_in_seconds():
    start_s = time.process_time()
    stdlib_source._all_pairs.__wrapped__()
    # 2.4 s of CPU when written; the margin is for slow and busy machines.
    assert time.process_time() - start_s < 10
