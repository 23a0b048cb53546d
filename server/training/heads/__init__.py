"""Training of classification heads (PEFT's task type SEQ_CLS)."""
