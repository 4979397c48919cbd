"""What a plan is: every choice of a run, with the reason for each, in one JSON file.

How a plan is made stands in `planner`. Plans are meant to be read and edited by people: unknown
keys, wrong types, numbers out of range and NaN are refused with the place where they stand.
"""

from effseg.plans.adversarial import AdversarialConfig
from effseg.plans.augment import CHANGES, POLICIES, AugmentConfig, Policy
from effseg.plans.config import Config, Heap
from effseg.plans.data import DataConfig, ExternalData
from effseg.plans.distillation import DistillationConfig
from effseg.plans.fingerprint import ChannelFacts, Fingerprint, LabelFacts
from effseg.plans.inference import InferenceConfig, PostprocessConfig
from effseg.plans.loss import LOSSES, LossChange, LossConfig
from effseg.plans.network import ImportedNetwork, NetworkConfig, PlannedNetwork
from effseg.plans.optimizer import LookaheadConfig, OptimizerConfig, ScheduleConfig
from effseg.plans.plan import Alternative, Channel, Label, Memory, Normalisation, Plan
from effseg.plans.sizes import format_bytes, format_shape, parse_bytes, total_stride
from effseg.plans.start import StartConfig, ThawConfig
from effseg.plans.stopping import StoppingConfig
from effseg.plans.training import TrainingConfig

__all__ = [
    "CHANGES",
    "LOSSES",
    "POLICIES",
    "AdversarialConfig",
    "Alternative",
    "AugmentConfig",
    "Channel",
    "ChannelFacts",
    "Config",
    "DataConfig",
    "DistillationConfig",
    "ExternalData",
    "Fingerprint",
    "Heap",
    "ImportedNetwork",
    "InferenceConfig",
    "Label",
    "LabelFacts",
    "LookaheadConfig",
    "LossChange",
    "LossConfig",
    "Memory",
    "NetworkConfig",
    "Normalisation",
    "OptimizerConfig",
    "Plan",
    "PlannedNetwork",
    "Policy",
    "PostprocessConfig",
    "ScheduleConfig",
    "StartConfig",
    "StoppingConfig",
    "ThawConfig",
    "TrainingConfig",
    "format_bytes",
    "format_shape",
    "parse_bytes",
    "total_stride",
]
