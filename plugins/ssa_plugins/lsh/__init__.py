"""``lsh``: keys that fall into the same hash buckets as the query."""

from ssa_framework.plugin import Registrar, hookimpl
from ssa_plugins.lsh.source import LSH, num_planes

__all__ = ["LSH", "num_planes"]


@hookimpl
def ssa_register_sources(register: Registrar) -> None:
    register.add("lsh", LSH)
