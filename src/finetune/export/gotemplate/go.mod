module finetune/gotemplate

go 1.21
