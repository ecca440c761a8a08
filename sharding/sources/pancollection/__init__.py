"""Source of HDF5 files of image patches, as PanCollection publishes them: ``ms lms pan gt`` of one sensor per file."""
