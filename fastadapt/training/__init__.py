"""Training on a user's own text: files, tasks, recipes, Hugging Face's ``Trainer``, result folders, prediction.

    data -> task -> batches -> trainer -> run -> folder, report
                                              folder -> predict

``data`` reads files and names the line of what is wrong in them; ``task`` says what is learnt from the rows; ``recipe``
holds the methods' defaults; ``run`` drives all of it, ``predict`` uses what it left behind.
"""
