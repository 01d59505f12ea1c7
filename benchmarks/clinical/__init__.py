"""Records of diabetic patients, from raw tables to a compressed, audited model. See README.md."""
