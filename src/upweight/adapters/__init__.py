"""From a fitted model to an Objective, its Examples and the encoder of its queries."""
