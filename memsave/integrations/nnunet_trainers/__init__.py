"""The folder that nnU-Net searches for trainers (`nnUNet_extTrainer`); it imports every module here by itself."""
