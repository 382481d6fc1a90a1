"""Stage two: train, sample and evaluate a student from a cache.

Never imports stage one.
"""

if __name__ != "tide.student_train":
    raise ImportError(
        "this folder is the package tide.student_train: install the project (pip install -e .) "
        "and import tide.student_train, not student_train"
    )
