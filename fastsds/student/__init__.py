"""The student: a CLIP, the latent head h_w, and what of them trains."""

from fastsds.student.head import HEAD_FILE, LatentHead
from fastsds.student.loading import load_student, make_student
from fastsds.student.model import MAX_LOGIT_SCALE, Student, StudentOutput
from fastsds.student.openclip import CONFIG_FILE, WEIGHT_SUFFIXES, WEIGHTS_FILE
from fastsds.student.saving import beside, read_student, save_student
from fastsds.student.tuning import apply_tuning, count_trained, size

__all__ = [
    "CONFIG_FILE", "HEAD_FILE", "MAX_LOGIT_SCALE", "WEIGHTS_FILE", "WEIGHT_SUFFIXES", "LatentHead", "Student",
    "StudentOutput", "apply_tuning", "beside", "count_trained", "load_student", "make_student", "read_student",
    "save_student", "size",
]  # fmt: skip
