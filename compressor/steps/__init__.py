"""The steps of the pipeline, one file a step: files in, files out. The mathematics is in the stages."""
