"""The row every comparison starts with: a video autoencoder's own decoder, as released or at random for its speed."""
