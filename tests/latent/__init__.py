"""A small latent diffusion model of the embedded world: the test bed for guidance of latent models. It is no part of the published pack."""
