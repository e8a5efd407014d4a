"""The routing service: the catalogue, the policies, what is known of health and latency; a ranked plan and why."""
