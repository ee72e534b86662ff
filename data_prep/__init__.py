"""Data sets as they are downloaded, made ready for `spark3d prepare`; nothing is downloaded."""
