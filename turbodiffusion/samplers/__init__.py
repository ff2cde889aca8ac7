"""Samplers: numerical methods as functions over a velocity, and the schedules they run on."""
