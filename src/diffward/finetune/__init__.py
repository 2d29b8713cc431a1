"""One training loop; a method is a step object in one file."""

from diffward.finetune import distill as distill  # registers the methods
from diffward.finetune import dp as dp
from diffward.finetune import dual as dual
from diffward.finetune import earlystop as earlystop
from diffward.finetune import hinge as hinge
from diffward.finetune import moment as moment
from diffward.finetune import mp as mp
from diffward.finetune import plain as plain
from diffward.finetune import smp as smp
from diffward.finetune.loop import TrainResult as TrainResult
from diffward.finetune.loop import train as train
from diffward.finetune.method import METHODS as METHODS
from diffward.finetune.settings import Settings as Settings
