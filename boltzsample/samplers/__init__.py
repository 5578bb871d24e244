"""Samplers: each fits itself to a target (`fit`) and then draws with everything frozen (`sample`)."""
