"""What is promised (plan), how it is kept (training), and what it costs (accounting)."""
