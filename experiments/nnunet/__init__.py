"""nnU-Net's default trainer and nnUNetTrainerMemsave at the same memory budget, on phantoms."""
