"""From records to what people read: every report is a document of typed blocks, and a renderer draws any of them."""
