"""ling_kernels inside transformers.

import ling_kernels.integrations.transformers as ling_transformers  # version 5: AutoModelForCausalLM knows Ling-2.0
ling_transformers.patch(model)  # a model of another class, or of the official code for version 4
"""

from ..versions import require

_transformers = require("transformers", "transformers", ">=4.52,<6")
NATIVE = int(_transformers.__version__.partition(".")[0]) >= 5  # version 4 has neither the registries nor the mappings

from .patch import patch, unpatch  # noqa: E402

__all__ = ["NATIVE", "patch", "unpatch"]

if NATIVE:
    from .balance import Balance
    from .config import LingHfConfig
    from .functions import register
    from .model import LingForCausalLM, LingModel
    from .native import register_model

    __all__ += ["Balance", "LingForCausalLM", "LingHfConfig", "LingModel"]
    register()
    register_model()
