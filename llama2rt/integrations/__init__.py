"""Our ops inside other libraries' models; each module imports the library it is named after."""
