"""How a Plan or a refusal is shown."""
