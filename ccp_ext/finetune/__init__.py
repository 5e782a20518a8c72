"""Recovery of a pruned model by training, with distillation if wanted, resumable bit for bit."""

from ccp_ext.finetune.config import FinetuneConfig
from ccp_ext.finetune.history import EpochRecord, History
from ccp_ext.finetune.training import Validation, finetune

__all__ = ["EpochRecord", "FinetuneConfig", "History", "Validation", "finetune"]
