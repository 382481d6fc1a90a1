"""Stage one: ask the teacher once and write what it says to a cache.

Never imports stage two.
"""

if __name__ != "tide.teacher_dump":
    raise ImportError(
        "this folder is the package tide.teacher_dump: install the project (pip install -e .) "
        "and import tide.teacher_dump, not teacher_dump"
    )
