raise RuntimeError("this plugin can't be imported")
