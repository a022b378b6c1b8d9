"""The exceptions of the project. Each is also the built-in exception that users would expect in its place."""

from __future__ import annotations


class SSAError(Exception):
    """Base class of everything that ssa_framework raises on purpose."""


class ConfigError(SSAError, ValueError):
    """A configuration that cannot be served: a field out of range, or fields that contradict each other."""


class ShapeError(SSAError, ValueError):
    """Tensors whose ranks, lengths or heads do not fit together."""


class DtypeError(SSAError, TypeError):
    """Tensors of a dtype, or a mix of dtypes, that attention is not defined for."""


class MaskError(SSAError, ValueError):
    """A mask whose shape fits nothing, or that could be read in two ways."""


class UnknownSourceError(SSAError, KeyError, ValueError):
    """A source name that no loaded plugin registered."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class UnknownOptionError(SSAError, TypeError, ValueError):
    """An option that the source does not declare."""


class SourceNameError(SSAError, ValueError):
    """A source name that is taken, or that is not a name."""


class PluginError(SSAError, ImportError):
    """A plugin that failed to load, or that registers something that is no source."""


class MissingExtraError(SSAError, ImportError):
    """An optional package is missing; the message names the extra that brings it."""


class ProposalError(SSAError, ValueError):
    """A source returned something that is not a valid proposal: wrong kind, shape, dtype or keys out of range."""


class BudgetError(SSAError, ValueError):
    """Neighbors that must be attended do not fit the budget ``num_neighbors``."""


class GraphError(SSAError, ValueError):
    """A neighbor graph that breaks its own invariants, or that does not fit the tensors it is applied to."""


class CacheError(SSAError, ValueError):
    """A cache that does not fit what is appended to it, or that is used in a way that it does not serve."""


class CheckpointError(SSAError, RuntimeError):
    """A state dict that is damaged, of another model, or of a layer that computes something else."""


class DistributedError(SSAError, RuntimeError):
    """Ranks that do not agree, or a rank that died or did not answer."""


class BackendUnavailableError(SSAError, RuntimeError, ValueError):
    """The backend that was asked for by name cannot serve this call."""


class BudgetWarning(UserWarning):
    """Band and columns alone exceed ``num_neighbors``; content sources keep a small floor."""
