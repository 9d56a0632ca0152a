"""Which tensor is "mlp_in", and the other sites, on each kind of language model.

A transcoder reads the MLP's *true input*, the vector which the MLP's weights multiply, and
writes *what the block adds to the residual stream*. One hook name is not one tensor on the three
kinds of model which SAELens trains on, and some names that look right are not:

| tensor | HookedTransformer | TransformerBridge | HookedProxyLM (HF modules) |
|---|---|---|---|
| residual before the norm | `hook_resid_mid`, `hook_mlp_in` | `hook_resid_mid` | none |
| normalised, before the gain | `ln2.hook_normalized` | `ln2.hook_normalized` | none |
| the MLP's true input | `ln2.hook_normalized * ln2.w + ln2.b` | `mlp.hook_in` | norm before MLP |
| what the block adds | `hook_mlp_out` | `hook_mlp_out` | norm after MLP, or MLP |

A HookedTransformer has no hook behind a norm's gain, so a site is a hook *and* the gain and offset
which make its activation the tensor that is meant. Where norms were folded there is no gain:
`ln2.hook_normalized` is then what the MLP reads, in another coordinate frame (`norm_frame`).
"""

from saelens_matryoshka.sites.find import POST_NORM_ARCHITECTURES, find_site
from saelens_matryoshka.sites.hooks import (
    block_hook,
    check_hook,
    hook_names,
    make_readable,
    probe,
    uncompiled,
)
from saelens_matryoshka.sites.norms import NormGain, hf_norm_gain, norm_frame, norm_gain
from saelens_matryoshka.sites.site import RESIDUAL_SITES, SITE_NAMES, Site

__all__ = [
    "POST_NORM_ARCHITECTURES",
    "RESIDUAL_SITES",
    "SITE_NAMES",
    "NormGain",
    "Site",
    "block_hook",
    "check_hook",
    "find_site",
    "hf_norm_gain",
    "hook_names",
    "make_readable",
    "norm_frame",
    "norm_gain",
    "probe",
    "uncompiled",
]
