"""What a long run needs: ranks, optimizer, checkpoints, log."""
