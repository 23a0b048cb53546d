"""What fused layers of every device share: which modules have a known form, and how modules are replaced."""
