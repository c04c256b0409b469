"""Measuring a run folder: what is measured, and what is kept so that nothing is measured twice."""
