"""Training of soft prompts on a frozen base model, with PEFT, and publishing what was trained."""
