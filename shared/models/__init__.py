"""Models as native transformers classes: no code from a checkpoint ever runs."""

from .loading import load_model, read_config
from .specs import TeacherSpec, teacher_spec

__all__ = ["TeacherSpec", "load_model", "read_config", "teacher_spec"]
