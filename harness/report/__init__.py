"""From records to what people read: one view model, several renderers."""
