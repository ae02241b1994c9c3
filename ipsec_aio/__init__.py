"""asyncio that knows what IPsec did."""

from .enums import Assurance as Assurance
from .errors import *  # noqa: F403
