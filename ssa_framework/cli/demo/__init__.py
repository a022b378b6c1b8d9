"""``ssa demo``: train on real text, measure against dense attention, write one page."""
