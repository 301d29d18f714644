"""Measuring: the plan, groups of runs that take turns, their workers, the checks."""
