"""The built-in neighbor sources, each a plugin like anybody's: they import `ssa_framework.plugin` and nothing else."""
