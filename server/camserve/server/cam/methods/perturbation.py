"""Methods that try things out on the model: mask the input or a layer, and watch the score.

The arithmetic stands beside this table, by what is tried: `score_weighted.py` shows the model what a channel marks, `ablation.py`
takes channels away, `windows.py` covers, keeps or magnifies parts of the input.
"""

from __future__ import annotations

from camserve.server.cam.methods.ablation import ABLATION_CAM, ABLATION_CAM_PYTORCH_GRAD_CAM
from camserve.server.cam.methods.method import Family, Method, Need, Reads, WorkClass
from camserve.server.cam.methods.score_weighted import (
    GROUP_CAM,
    IS_CAM,
    IS_CAM_TORCHCAM,
    SCORE_CAM,
    SCORE_CAM_PYTORCH_GRAD_CAM,
    SCORE_CAM_TORCHCAM,
    SS_CAM,
    SS_CAM_TORCHCAM,
)
from camserve.server.cam.methods.windows import OCCLUSION, RISE, SESS
from camserve.server.jobs import Profile

__all__ = ["PERTURBATION"]

_NEITHER_LIBRARY = frozenset({Profile.PYTORCH_GRAD_CAM, Profile.TORCHCAM})
_GRADIENT = frozenset({Need.GRADIENT})

PERTURBATION: tuple[Method, ...] = (
    Method(
        slug="score-cam",
        title="Score-CAM",
        paper="Wang et al., Score-CAM, arXiv:1910.01279, algorithm 1: sum_k softmax_k(y(x * M_k) - y(baseline)) A_k",
        family=Family.PERTURBATION,
        work=WorkClass.AMPLIFIED,
        cost="one forward a channel",
        arithmetic=SCORE_CAM,
        rectifies=True,
        variants={Profile.PYTORCH_GRAD_CAM: SCORE_CAM_PYTORCH_GRAD_CAM, Profile.TORCHCAM: SCORE_CAM_TORCHCAM},
        parameters=frozenset({"channels"}),
    ),
    Method(
        slug="ablation-cam",
        title="Ablation-CAM",
        paper="Desai and Ramaswamy, Ablation-CAM, WACV 2020, doi:10.1109/WACV45572.2020.9093360: sum_k (y - y_k) / y A_k",
        family=Family.PERTURBATION,
        work=WorkClass.AMPLIFIED,
        cost="one forward behind the layer a channel",
        arithmetic=ABLATION_CAM,
        rectifies=True,
        variants={Profile.PYTORCH_GRAD_CAM: ABLATION_CAM_PYTORCH_GRAD_CAM},
        absent_from=frozenset({Profile.TORCHCAM}),
        parameters=frozenset({"channels"}),
    ),
    Method(
        slug="ss-cam",
        title="SS-CAM",
        paper="Wang et al., SS-CAM, arXiv:2006.14255: Score-CAM with each score the mean over noisy masks",
        family=Family.PERTURBATION,
        work=WorkClass.AMPLIFIED,
        cost="35 forwards a channel",
        arithmetic=SS_CAM,
        rectifies=True,
        variants={Profile.TORCHCAM: SS_CAM_TORCHCAM},
        absent_from=frozenset({Profile.PYTORCH_GRAD_CAM}),
        parameters=frozenset({"channels", "samples", "noise", "seed"}),
    ),
    Method(
        slug="is-cam",
        title="IS-CAM",
        paper="Naidu et al., IS-CAM, arXiv:2010.03023: Score-CAM with each score integrated from no mask to the whole",
        family=Family.PERTURBATION,
        work=WorkClass.AMPLIFIED,
        cost="ten forwards a channel",
        arithmetic=IS_CAM,
        rectifies=True,
        variants={Profile.TORCHCAM: IS_CAM_TORCHCAM},
        absent_from=frozenset({Profile.PYTORCH_GRAD_CAM}),
        parameters=frozenset({"channels", "steps"}),
    ),
    Method(
        slug="group-cam",
        title="Group-CAM",
        paper="Zhang et al., Group-CAM, arXiv:2103.13859: masks of 32 groups of channels, weighed by what each adds to a blur",
        family=Family.PERTURBATION,
        work=WorkClass.AMPLIFIED,
        cost="one gradient and 33 forwards",
        arithmetic=GROUP_CAM,
        needs=_GRADIENT,
        rectifies=True,
        absent_from=_NEITHER_LIBRARY,
    ),
    Method(
        slug="sess",
        title="SESS",
        paper="Tursun et al., SESS, arXiv:2207.01769: Grad-CAMs of sliding parts at 12 scales, weighed by the parts' scores",
        family=Family.PERTURBATION,
        work=WorkClass.AMPLIFIED,
        cost="one forward and one gradient a part, usually 122 parts",
        arithmetic=SESS,
        needs=_GRADIENT,
        rectifies=True,
        absent_from=frozenset({Profile.TORCHCAM}),
        parameters=frozenset({"stride"}),
    ),
    Method(
        slug="occlusion",
        title="Occlusion",
        paper="Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, arXiv:1311.2901: y(x) - y(x covered)",
        family=Family.PERTURBATION,
        work=WorkClass.AMPLIFIED,
        cost="one forward a patch, usually 225",
        arithmetic=OCCLUSION,
        reads=Reads.INPUT,
        absent_from=_NEITHER_LIBRARY,
        parameters=frozenset({"window", "stride"}),
    ),
    Method(
        slug="rise",
        title="RISE",
        paper="Petsiuk et al., RISE, arXiv:1806.07421: 1 / (n p) sum_i y(x * M_i) M_i over random masks",
        family=Family.PERTURBATION,
        work=WorkClass.AMPLIFIED,
        cost="one forward a mask, usually 1000",
        arithmetic=RISE,
        reads=Reads.INPUT,
        absent_from=_NEITHER_LIBRARY,
        parameters=frozenset({"samples", "seed"}),
    ),
)
