//! Preference-optimization losses (APO, DPO) and reward metrics as pure functions on Burn tensors.
