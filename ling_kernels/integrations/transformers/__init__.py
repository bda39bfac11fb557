"""ling_kernels inside transformers.

import ling_kernels.integrations.transformers as ling_transformers  # version 5: AutoModelForCausalLM knows Ling-2.0
ling_transformers.patch(model)  # a model of another class, or of the official code for version 4
"""

from ..versions import require

require("transformers", "transformers", ">=4.52,<6")

from .names import NATIVE  # noqa: E402
from .patch import patch, unpatch  # noqa: E402

__all__ = ["NATIVE", "patch", "unpatch"]

if NATIVE:
    require("transformers", "transformers", ">=5.14,<6")
    from .balance import Balance
    from .config import LingHfConfig
    from .functions import register
    from .model import LingForCausalLM, LingModel
    from .native import register_model

    __all__ += ["Balance", "LingForCausalLM", "LingHfConfig", "LingModel"]
    register()
    register_model()
