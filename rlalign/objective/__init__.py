"""What the update maximises: advantages, corrections of the mismatch, policy losses, the price of leaving the reference."""
