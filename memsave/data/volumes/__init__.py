"""Volumes for segmentation: layouts of data sets, crops, whole volumes, and metrics.

layouts         naming conventions of data sets; finding cases
schemes         numbering of labels, and the regions that are scored
nifti           reading one file
reader          reading and checking one case; regions and labels
orientation     reorienting volumes to the orientation of BraTS and back
splits          training and held-out cases
check           all faults of a data set
transforms      MONAI preprocessing and augmentation
dataset         training crops and whole volumes
metrics         Dice and HD95 by the BraTS rules; `lesion_metrics`: lesion-wise
phantoms        synthetic cases in the layout of BraTS 2021
"""
