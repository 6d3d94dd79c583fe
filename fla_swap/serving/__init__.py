"""An OpenAI-compatible endpoint over slots of constant-size state: `fla-swap serve DIR`."""
