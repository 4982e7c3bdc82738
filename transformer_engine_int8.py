"""teint8 under the name of its distribution: ``from transformer_engine_int8 import te_int8_autocast``."""

from teint8 import *  # noqa: F403
from teint8 import __all__ as __all__
