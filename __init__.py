"""tide distils large diffusion language models into small ones, offline.

Stage one (`tide.teacher_dump`) asks a teacher once and writes its answers to a cache;
stage two (`tide.student_train`) trains a student from that cache and never opens the teacher.
"""

__version__ = "0.1.0.dev0"

if __name__ == "tide":  # pytest imports this folder under the name of the clone
    from .shared.auto_classes import offer_families

    offer_families()


def __getattr__(name: str):
    """`tide.open_cache`, imported on first use so that `import tide` stays cheap."""
    if name == "open_cache":
        from .shared.cache import open_cache

        return open_cache
    raise AttributeError(f"module 'tide' has no attribute {name!r}")
