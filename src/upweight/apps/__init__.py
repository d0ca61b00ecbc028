"""The paper's four uses (section 5) and the question of contrast (section 6), by the public API only."""

__all__: list[str] = []
