"""What a generated video is worth."""
