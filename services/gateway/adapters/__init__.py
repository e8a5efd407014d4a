"""What translates between the gateway's ports and the contracts of other services."""
