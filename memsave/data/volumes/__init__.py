"""Volumes as training data: BraTS folders and other layouts, crops, whole volumes, and metrics.

layouts         how data sets name their files; finding cases
schemes         how their labels are numbered, and the regions that are scored
nifti           reading a file
reader          reading and checking a case; regions and labels
orientation     turning volumes to the orientation of BraTS and back
splits          which cases train and which are held out
check           every fault of a data set
transforms      MONAI preprocessing and augmentation
dataset         training crops and whole volumes
metrics         Dice and HD95 by the BraTS rules; `lesion_metrics`: lesion by lesion
phantoms        synthetic cases in the same layout
"""
