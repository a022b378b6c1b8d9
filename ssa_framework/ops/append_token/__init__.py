"""One new token put where a captured step reads it."""

from ssa_framework.ops.append_token.api import AppendToken, append_token
from ssa_framework.ops.append_token.types import TokenPlace

__all__ = ["AppendToken", "TokenPlace", "append_token"]
